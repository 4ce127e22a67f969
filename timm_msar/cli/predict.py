"""Print the five most probable classes of images."""
