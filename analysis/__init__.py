"""Pictures of what a latent encodes, the HTML report, and export of the encoder and of its features.

Packages beyond requirements.txt are imported in the functions that use them. `utils.cli.require` checks that they are
installed before any work starts.
"""
