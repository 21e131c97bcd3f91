//! What a run of many processes needs around its ranks: who is watched, and how it is told what went wrong.

pub mod watchdog;
