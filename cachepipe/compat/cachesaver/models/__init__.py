"""CacheSaver's clients, one module a provider, each imported when it is first used."""
