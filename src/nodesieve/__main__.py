"""`python -m nodesieve` is `nodesieve`."""

from nodesieve.cli import main

main()
