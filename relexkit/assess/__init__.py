"""What a run has shown: backtests in its own past, forecasts with intervals, advice."""
