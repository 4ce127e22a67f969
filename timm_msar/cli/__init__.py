"""The command `timm-msar`: one subcommand a module, started by timm_msar_command.

`add_arguments` of a subcommand adds its words to a parser, and `main` runs it. Whatever a user can put right is raised
as a CommandError, in all of these modules.
"""
