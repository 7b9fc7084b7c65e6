"""One worker: model, weights, paged caches, scheduler, engine, shipping, and the prefill and decode roles."""
