//! What the view of an instruction refuses.

use crate::device::cpu::Cpu;
use crate::device::{Binding, DType, Region, Slot};

fn slot(region: Region, offset: usize, len: usize) -> Slot {
    Slot { region, offset, len, dtype: DType::F32 }
}

/// Launches with one input and one output on two buffers of 64 floats.
fn launch(input: Slot, output: Slot, same: bool) {
    let mut cpu = Cpu::new(1);
    let [first, second] = [256, 256].map(|bytes| cpu.allocate(bytes).unwrap());
    let binding = Binding::default().with(Region::Arena, first).with(Region::Io, if same { first } else { second });
    cpu.launch(&binding, &[input], &[output], 0, None);
}

#[test]
fn operands_side_by_side_are_fine() {
    launch(slot(Region::Arena, 0, 32), slot(Region::Arena, 128, 32), false);
    launch(slot(Region::Arena, 0, 64), slot(Region::Io, 0, 64), false);
}

#[test]
#[should_panic = "operands overlap"]
fn an_output_over_an_input_is_refused() {
    launch(slot(Region::Arena, 0, 33), slot(Region::Arena, 128, 32), false);
}

#[test]
#[should_panic = "operands overlap"]
fn one_buffer_behind_two_regions_is_seen() {
    launch(slot(Region::Arena, 0, 64), slot(Region::Io, 0, 64), true);
}

#[test]
#[should_panic = "outside its buffer"]
fn an_end_that_wraps_is_refused() {
    launch(slot(Region::Arena, 0, 4), slot(Region::Io, 8, usize::MAX / 4), false);
}

#[test]
#[should_panic = "not aligned"]
fn a_crooked_place_is_refused() {
    launch(slot(Region::Arena, 2, 4), slot(Region::Io, 0, 4), false);
}
