"""Performs what `cachepipe.contract` decides: the one way to the samples of a store."""
