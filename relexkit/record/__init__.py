"""A live model into a store while it trains: recorder, callback, sketch, live advice."""
