//! Tests of the upstream side: a small mesh, its rules, and what comes of them.
