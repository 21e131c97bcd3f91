//! An op alone, on CPU cores.

use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Binding, DType, Device, Region, Slot, cpu::Cpu};
use ddpm_dist::tape::{Op, Spec, Tape, Var, plan};
use std::sync::Arc;

/// Runs `op` on these inputs; gives its outputs, of which the first `updated.len()` are updated in place.
pub fn on_cpu(op: impl Op, inputs: &[Vec<u8>], updated: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut tape = Tape::new();
    let signature = op.signature();
    let mut io = |kind: &str, specs: &[Spec], contents: &[Vec<u8>]| -> Vec<Var> {
        let spec_of = |(i, spec): (usize, &Spec)| match spec.shape {
            Some(_) => spec.clone(),
            // A flat buffer, as long as it is given.
            None => Spec::f32([contents[i].len() / 4]),
        };
        let specs = specs.iter().enumerate().map(spec_of);
        specs.enumerate().map(|(i, spec)| tape.io(&format!("{kind} {i}"), spec)).collect()
    };
    let ins = io("input", &signature.inputs, inputs);
    let outs = io("output", &signature.outputs, updated);
    tape.push_into(Arc::new(op), &ins, &outs, (1 << updated.len()) - 1);
    let program = Arc::new(plan(&tape, None, None));
    let mut device = Device::Cpu(Cpu::new(2));
    let [buffer, arena] = [program.io_bytes, program.arena_bytes].map(|bytes| device.allocate(bytes).unwrap());
    device.upload(buffer, 0, &vec![0xFFu8; program.io_bytes]).unwrap();
    for (kind, contents) in [("input", inputs), ("output", updated)] {
        for (i, content) in contents.iter().enumerate() {
            let slot = program.io(&format!("{kind} {i}"));
            assert_eq!(bytes(&slot), content.len(), "{kind} {i}");
            device.upload(buffer, slot.offset, content).unwrap();
        }
    }
    let binding = Binding::default().with(Region::Io, buffer).with(Region::Arena, arena);
    program.load(&mut device, binding).unwrap().run(&mut device, &mut Solo).unwrap();
    let read = |i: usize| {
        let slot = program.io(&format!("output {i}"));
        let mut content = vec![0u8; bytes(&slot)];
        device.download(buffer, slot.offset, &mut content).unwrap();
        content
    };
    (0..signature.outputs.len()).map(read).collect()
}

fn bytes(slot: &Slot) -> usize {
    slot.len
        * match slot.dtype {
            DType::U8 => 1,
            DType::Bf16 => 2,
            DType::U32 | DType::F32 => 4,
        }
}
