"""The `streamo-edge` command; one file per subcommand."""
