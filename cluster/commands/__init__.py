"""What the ``paceline`` command does, one module per subcommand."""
