"""Bundle → engines → answers: the part of tango-edge that a device installs."""
