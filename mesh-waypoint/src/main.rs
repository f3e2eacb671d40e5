//! `mesh-waypoint`: command line only; what it does is in the library.

fn main() {}
