"""The step: what an iteration computes, and the recipes that compute it."""
