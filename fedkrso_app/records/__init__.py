"""What travels and what stays: arrays by schema, their bytes, the ledger of entries."""
