"""What a run needs from the machine: processes, precision, console and metrics files."""
