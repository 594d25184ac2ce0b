"""What people and timers talk to: results on stdout, all else on stderr, stable exit codes."""
