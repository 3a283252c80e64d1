"""Measuring servers from outside: `streamserve bench`. Any server that speaks OpenAI's API will do."""
