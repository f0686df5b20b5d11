"""An engine without a model, for load tests: real queues, pages, drafts and streams."""
