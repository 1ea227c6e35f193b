"""Methods of compression, one file a kind: each takes a linear map and a budget in bits and gives another form of it."""
