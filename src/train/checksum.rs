//! One number for what a rank holds, to compare with the others'.

use crate::device::{BufferId, Device, DeviceError};
use crate::multiversion;

/// Floats at a time.
const BLOCK: usize = 1 << 14;
const LANES: usize = 32;

/// Of the bits of the first `len` floats of each buffer. Two states that differ in one float have different checksums: each step of the hash
/// is a bijection of what came before.
///
/// # Errors
/// The device's.
pub fn checksum(device: &Device, buffers: &[BufferId], len: usize) -> Result<u64, DeviceError> {
    let mut lanes = [0x811c_9dc5u32; LANES];
    let mut block = vec![0u32; BLOCK];
    for &buffer in buffers {
        for start in (0..len).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(len - start)];
            device.download(buffer, start, block)?;
            mix(&mut lanes, block);
        }
    }
    let join = |hash: u64, &lane: &u32| (hash ^ u64::from(lane)).wrapping_mul(0x0000_0100_0000_01b3);
    Ok(lanes.iter().fold(0xcbf2_9ce4_8422_2325, join))
}

multiversion! {
    /// FNV-1a of words, each of which goes to the lane of its place.
    fn mix(lanes: &mut [u32; LANES], words: &[u32]) {
        for words in words.chunks(LANES) {
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane = (*lane ^ word).wrapping_mul(0x0100_0193);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn any_flipped_bit_changes_it() {
        let mut device = Device::Cpu(Cpu::new(1));
        let len = BLOCK + 77;
        let buffers = [device.allocate(4 * len).unwrap(), device.allocate(4 * len).unwrap()];
        let values: Vec<f32> = (0..len).map(|i| (i as f32).sin()).collect();
        buffers.iter().for_each(|&buffer| device.upload(buffer, 0, &values).unwrap());
        let right = checksum(&device, &buffers, len).unwrap();
        assert_eq!(checksum(&device, &buffers, len).unwrap(), right);
        for (buffer, place, bit) in [(0, 0, 0), (0, BLOCK, 31), (1, len - 1, 12), (1, 31, 1)] {
            let flipped = f32::from_bits(values[place].to_bits() ^ 1 << bit);
            device.upload(buffers[buffer], place, &[flipped]).unwrap();
            assert_ne!(checksum(&device, &buffers, len).unwrap(), right, "bit {bit} of float {place}");
            device.upload(buffers[buffer], place, &[values[place]]).unwrap();
        }
        assert_eq!(checksum(&device, &buffers, len).unwrap(), right);
    }
}
