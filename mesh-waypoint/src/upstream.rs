//! Which endpoint takes a request, and whether it may be tried (again).

/// Policies of all destinations.
#[derive(Debug, Default)]
pub struct Destinations;
