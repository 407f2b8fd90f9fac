"""Planning calls and running the plans."""
