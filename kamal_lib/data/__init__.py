"""Where samples come from: procedural rooms, real data sets, transforms and loaders."""
