"""`tango`: one file per command."""
