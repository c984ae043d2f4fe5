"""Bridges to other programs. Each needs a package of its own, and is imported only when it is asked for."""
