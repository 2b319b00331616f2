"""The typed configuration of every command: choices, defaults, help, files and command line."""
