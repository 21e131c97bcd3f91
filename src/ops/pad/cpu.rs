use crate::device::cpu::Launch;

pub(super) fn pad([[_, columns], [_, with_columns]]: [[usize; 2]; 2], launch: &Launch<'_>) {
    let (x, y) = (launch.input::<f32>(0), launch.output::<f32>(0));
    y.fill(0.0);
    for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact_mut(with_columns)) {
        y[..columns].copy_from_slice(x);
    }
}

pub(super) fn pad_gradient([[_, columns], [_, with_columns]]: [[usize; 2]; 2], launch: &Launch<'_>) {
    let (dy, dx) = (launch.input::<f32>(0), launch.output::<f32>(0));
    let adds = launch.updates(0);
    for (dy, dx) in dy.chunks_exact(with_columns).zip(dx.chunks_exact_mut(columns)) {
        for (dx, dy) in dx.iter_mut().zip(dy) {
            *dx = if adds { *dx + dy } else { *dy };
        }
    }
}
