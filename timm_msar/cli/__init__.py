"""The command `timm-msar`: one subcommand a module, started by timm_msar_command."""
