"""Recurrent language models (LSTM, GRU) as models of transformers."""
