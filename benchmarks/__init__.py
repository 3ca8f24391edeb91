"""How fast cachepipe is, against floors and controls that are measured in the same run."""
