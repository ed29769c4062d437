"""What a recipe would train on, token by token, before it trains."""
