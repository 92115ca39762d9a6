"""One file a family of providers: ``PROVIDERS`` lists what it defines."""
