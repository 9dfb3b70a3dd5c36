"""From a command on this machine to a job on others: preflight and submission."""
