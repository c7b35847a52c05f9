"""Judging of novel views: generated views of objects beside the true ones and beside baselines."""
