"""The `tango` program: one module per command, `args` for the options they share, `main` for the table."""
