"""How the drop-in clients of `cachepipe.clients` are made from the SDKs' own classes."""
