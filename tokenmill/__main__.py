"""`python -m tokenmill` is the `tokenmill` program."""

from tokenmill.cli.main import main

main()
