"""The step loop: requests in, batch plans to a runner, events out. Imports no torch."""
