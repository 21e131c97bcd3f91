//! A real GPU, asked what the machine made of software is asked: each launch runs twice, with two patterns in memory that nobody has
//! written and on either side of every buffer.

use crate::machine::Buffer;
use ddpm_dist::device::cuda::{Argument, CudaError, Gpu, Launch, Memory};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Bytes on either side of a buffer that a kernel must leave alone; a multiple of any alignment.
const MARGIN: usize = 512;

fn first_gpu() -> &'static Mutex<Gpu> {
    static GPU: OnceLock<Mutex<Gpu>> = OnceLock::new();
    GPU.get_or_init(|| Mutex::new(Gpu::open(0).unwrap_or_else(|error| panic!("{error}"))))
}

/// As `sim::try_launch`.
pub fn try_launch(
    launch: &Launch,
    inputs: &[Buffer],
    outputs: &[Buffer],
    workspace: &Buffer,
) -> Result<Vec<Vec<u8>>, String> {
    let mut gpu = first_gpu().lock().unwrap_or_else(PoisonError::into_inner);
    let of = |argument| match argument {
        &Argument::Input(place) => Some((argument, &inputs[place])),
        &Argument::Output(place) => Some((argument, &outputs[place])),
        Argument::Scratch => Some((argument, workspace)),
        Argument::Null | Argument::Value(_) => None,
    };
    let buffers: Vec<(&Argument, &Buffer)> = launch.arguments.iter().filter_map(of).collect();
    let [first, second] = [0xFF, 0x7B].map(|pattern| run(&mut gpu, launch, &buffers, pattern));
    let (first, second) = (first?, second?);
    if first != second {
        return Err("two runs leave other bits: it reads what nobody has written, or leaves an output unwritten".into());
    }
    Ok(first)
}

/// A buffer with its margins.
fn surrounded(buffer: &Buffer, pattern: u8) -> Vec<u8> {
    match buffer {
        Buffer::Input(content) | Buffer::Updated(content) => {
            [&[pattern; MARGIN][..], content, &[pattern; MARGIN]].concat()
        }
        Buffer::Output(bytes) => vec![pattern; bytes + 2 * MARGIN],
    }
}

fn run(gpu: &mut Gpu, launch: &Launch, buffers: &[(&Argument, &Buffer)], pattern: u8) -> Result<Vec<Vec<u8>>, String> {
    let say = |error: CudaError| error.to_string();
    let put = |(_, buffer): &(&Argument, &Buffer)| -> Result<Memory, CudaError> {
        let content = surrounded(buffer, pattern);
        let memory = gpu.allocate(content.len())?;
        gpu.upload(memory, &content)?;
        Ok(memory)
    };
    let memories = buffers.iter().map(put).collect::<Result<Vec<Memory>, CudaError>>().map_err(say)?;
    let address = |argument: &Argument| {
        let place = buffers.iter().position(|(other, _)| *other == argument);
        place.map_or(0, |place| memories[place].address + MARGIN as u64)
    };
    // SAFETY: each buffer has the size that the test gives it; the margins are there for those that are wrong.
    unsafe { gpu.launch(launch, address) }.map_err(say)?;
    gpu.synchronize().map_err(say)?;
    let mut written = Vec::new();
    for (memory, (argument, buffer)) in memories.into_iter().zip(buffers) {
        let content = gpu.download(memory).map_err(say)?;
        gpu.free(memory).map_err(say)?;
        let inside = MARGIN..content.len() - MARGIN;
        if content[..inside.start].iter().chain(&content[inside.end..]).any(|byte| *byte != pattern) {
            return Err(format!("{argument:?}: it wrote beside the buffer"));
        }
        match buffer {
            Buffer::Input(before) if content[inside.clone()] != before[..] => {
                return Err(format!("{argument:?}: it wrote to an input"));
            }
            Buffer::Input(_) => {}
            Buffer::Output(_) | Buffer::Updated(_) => written.push(content[inside].to_vec()),
        }
    }
    Ok(written)
}
