"""The service: gateway, router, prefix-cache controller, ledger, and the tools that talk to it over HTTP."""
