"""The tests of Python children: how they start, what their tasks see, how they end."""
