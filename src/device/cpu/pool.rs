//! Sequential stand-in until the thread pool lands.
pub struct Pool {
    threads: usize,
    scratch: std::sync::Mutex<Vec<f32>>,
}
impl Pool {
    pub fn new(threads: usize) -> Pool {
        Pool { threads, scratch: Default::default() }
    }
    pub fn threads(&self) -> usize {
        self.threads
    }
    pub fn reserve_scratch(&mut self, n: usize) {
        let mut s = self.scratch.lock().unwrap();
        if s.len() < n {
            s.resize(n, f32::NAN)
        }
    }
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let mut s = self.scratch.lock().unwrap();
        for i in 0..tasks {
            f(i, &mut s)
        }
    }
    pub fn for_chunks<T: Send>(&self, out: &mut [T], len: usize, f: impl Fn(usize, &mut [T], &mut [f32]) + Sync) {
        let mut s = self.scratch.lock().unwrap();
        for (i, c) in out.chunks_mut(len).enumerate() {
            f(i, c, &mut s)
        }
    }
    pub fn for_chunks2<T: Send, U: Send>(
        &self,
        a: &mut [T],
        la: usize,
        b: &mut [U],
        lb: usize,
        f: impl Fn(usize, &mut [T], &mut [U], &mut [f32]) + Sync,
    ) {
        let mut s = self.scratch.lock().unwrap();
        for (i, (x, y)) in a.chunks_mut(la).zip(b.chunks_mut(lb)).enumerate() {
            f(i, x, y, &mut s)
        }
    }
    pub fn for_chunks3<T: Send, U: Send, V: Send>(
        &self,
        a: &mut [T],
        la: usize,
        b: &mut [U],
        lb: usize,
        c: &mut [V],
        lc: usize,
        f: impl Fn(usize, &mut [T], &mut [U], &mut [V], &mut [f32]) + Sync,
    ) {
        let mut s = self.scratch.lock().unwrap();
        for (i, ((x, y), z)) in a.chunks_mut(la).zip(b.chunks_mut(lb)).zip(c.chunks_mut(lc)).enumerate() {
            f(i, x, y, z, &mut s)
        }
    }
}
