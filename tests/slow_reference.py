"""MS-SAR written from Eq. (1) and (2) position by position: slow, in float64, and without any of the package's code."""

import math

import torch


def coordinate_set(h, w, height, width, scale, strategy):
    """S_K(h, w) of Section 3.2, as a list of positions."""
    everywhere = [(i, j) for i in range(height) for j in range(width)]
    if strategy == 'sliding':
        reach = math.sqrt(height * width) / scale
        return [(i, j) for i, j in everywhere if abs(i - h) <= reach and abs(j - w) <= reach]
    rows, cols = min(scale, height), min(scale, width)
    region = (h * rows // height, w * cols // width)
    return [(i, j) for i, j in everywhere if (i * rows // height, j * cols // width) == region]


def coordinate_sets(height, width, scale, strategy):
    """The distinct sets, and for every position, row by row, the index of its own.

    With sliding windows each position has a set of its own, even where two windows hold the same positions: that is
    how often they count in the statistics of batch norm.
    """
    sets, index = [], {}
    for h in range(height):
        for w in range(width):
            if (h, w) in index:
                continue
            members = coordinate_set(h, w, height, width, scale, strategy)
            for position in members if strategy == 'regional' else [(h, w)]:
                index[position] = len(sets)
            sets.append(members)
    return sets, [index[h, w] for h in range(height) for w in range(width)]


def batch_norm(vectors, bn, channels, training):
    """Batch norm of vectors (N, C), the `channels` of a norm. In evaluation it has running statistics."""
    if training:
        mean, var = vectors.mean(0), vectors.var(0, unbiased=False)
    else:
        mean, var = bn.running_mean[channels].double(), bn.running_var[channels].double()
    return (vectors - mean) / torch.sqrt(var + bn.eps) * bn.weight[channels].double() + bn.bias[channels].double()


def gates(layer, x, source=None):
    """Z of Eq. (2) for x, (B, D, H, W), in float64."""
    source = (x if source is None else source).double()
    batch, _, height, width = source.shape
    gate = layer.gate[0]
    z = 0
    for number, scale in enumerate(layer.scales):
        sets, index = coordinate_sets(height, width, scale, layer.strategy)
        y = []
        for image in source:
            for members in sets:
                rows, cols = zip(*members)
                y.append(image[:, rows, cols].sum(-1) / len(members))
        # A scale has the channels of its own group, and with them weights of its own.
        hidden_width, out_width = gate.fc1.out_channels // len(layer.scales), layer.channels
        hidden_channels = slice(number * hidden_width, (number + 1) * hidden_width)
        out_channels = slice(number * out_width, (number + 1) * out_width)
        omega1 = gate.fc1.weight.double()[hidden_channels, :, 0, 0]
        omega2 = gate.fc2.weight.double()[out_channels, :, 0, 0]
        hidden = torch.relu(batch_norm(torch.stack(y) @ omega1.T, gate.bn1, hidden_channels, layer.training))
        z_k = torch.sigmoid(batch_norm(hidden @ omega2.T, gate.bn2, out_channels, layer.training))
        z_k = z_k.reshape(batch, len(sets), -1)[:, index]
        z = z + z_k.transpose(1, 2).reshape(batch, -1, height, width)
    return z / len(layer.scales)
