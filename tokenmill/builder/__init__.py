"""From a model to a program: capture, graph, passes, lowering, memory plan, pictures."""
