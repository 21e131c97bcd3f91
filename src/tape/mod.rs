//! The step as a program.
//!
//! A model is traced once into a [`Tape`] of [`Op`]s. The tape differentiates itself into more ops ([`Tape::backward`]); the
//! [planner](plan) turns the result into a flat, static [`Program`]: instructions over slots of memory that are known before
//! the first step. Nothing in here knows what any op computes.

mod backward;
mod fuse;
mod layout;
mod listing;
mod op;
mod plan;
mod plans;
mod program;
mod record;
mod shape;
mod slices;

#[cfg(test)]
mod tests;

pub use backward::{Gradient, Of};
pub use layout::{Param, ParamLayout, Part, Placed};
pub use listing::{OpGroup, Summary, human_bytes, human_flops};
pub use op::{Elements, Op, Scratch, Signature, Spec};
pub use plan::{Buckets, Reduction, plan};
pub use plans::{agree_on_plans, pieces};
pub use program::{Bucket, Instruction, IoSlot, Kind, Lane, Loaded, Program, RunError};
pub use record::{Phase, Tape, Var};
pub use shape::Shape;
pub use slices::{Slices, in_slices};
