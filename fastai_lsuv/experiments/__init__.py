"The studies of the source documents: their networks and data."
