"""Prompts of many kinds for tests on real models."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Q: What is 12 + 30?\nA:",
    "The three primary colours are",
    "Dear Sir or Madam,",
    "In 1969, the first humans",
    "La capitale de l'Italie est",
    "import numpy as np\n\nx = np.",
    "Roses are red,",
    "The opposite of hot is",
    "1, 2, 3, 4, 5,",
    "To make bread you need flour,",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "Shakespeare wrote",
    "A triangle has",
    "E = mc",
    "The sun rises in the east and sets in the",
)
