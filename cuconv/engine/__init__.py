"""From a problem to a plan, and running it."""
