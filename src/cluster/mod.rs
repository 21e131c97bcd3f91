//! Many processes as one run: starting them on this machine and others, watching them, ending and starting them again.

pub mod launcher;
