/* Group normalisation with what stands around it, for images whose channels come last.
 *
 *     h = (x + shift - mean) / deviation over each group of channels;  u = gain h + bias;  y = u sigmoid(u), or u
 *
 * x, y [N, P, C]: images, pixels, channels, P C numbers of an image next to each other. shift [N, C] or NULL.
 * gain, bias [N, C] with stride C, or [C] with stride 0. mean and rstd (1 / deviation) [N, G]. An image is small enough
 * to stay in a core's cache while several loops run over it, so that memory is read and written once. Every image is
 * computed on its own: nothing depends on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LOOP for (int64_t p = 0; p < P; p++) for (int64_t c = 0; c < C; c++)

/* e^x to 2 units in the last place, in a form that compilers turn into vector instructions. 2^n e^r, |r| <= ln(2) / 2;
 * ln(2) in two parts, the first of few enough bits that n times it is exact; e^r by its Taylor series. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return sum * power.value;
}

void group_norm_forward(const float *x, const float *shift, const float *gain, const float *bias, int64_t stride,
                        float *y, float *mean, float *rstd, int64_t N, int64_t P, int64_t C, int64_t G, float eps,
                        int64_t act) {
    const int64_t D = C / G;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * P * C, *g = gain + n * stride, *b = bias + n * stride;
        float *yn = y + n * P * C;
        float sum[C], offset[C], factor[C];
        memset(sum, 0, sizeof sum);
        LOOP sum[c] += xn[p * C + c];
        for (int64_t k = 0; k < G; k++) {
            double total = 0;
            for (int64_t c = k * D; c < (k + 1) * D; c++) {
                offset[c] = shift ? shift[n * C + c] : 0;
                total += sum[c] + (double)P * offset[c];
            }
            mean[n * G + k] = total / (P * D);
            for (int64_t c = k * D; c < (k + 1) * D; c++) offset[c] -= mean[n * G + k];
        }
        memset(sum, 0, sizeof sum);
        LOOP {
            float d = xn[p * C + c] + offset[c];
            sum[c] += d * d;
        }
        for (int64_t k = 0; k < G; k++) {
            double total = 0;
            for (int64_t c = k * D; c < (k + 1) * D; c++) total += sum[c];
            rstd[n * G + k] = 1 / sqrt(total / (P * D) + eps);
            for (int64_t c = k * D; c < (k + 1) * D; c++) factor[c] = g[c] * rstd[n * G + k];
        }
        if (act) LOOP {
            float u = (xn[p * C + c] + offset[c]) * factor[c] + b[c];
            yn[p * C + c] = u / (1 + exponential(-u));
        }
        else LOOP yn[p * C + c] = (xn[p * C + c] + offset[c]) * factor[c] + b[c];
    }
}

/* From dy [N, P, C]: dx [N, P, C], dshift [N, C] or NULL, and dgain, dbias [N, C] of each image. */
void group_norm_backward(const float *dy, const float *x, const float *shift, const float *gain, const float *bias,
                         int64_t stride, const float *mean, const float *rstd, float *dx, float *dshift, float *dgain,
                         float *dbias, int64_t N, int64_t P, int64_t C, int64_t G, int64_t act) {
    const int64_t D = C / G;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * P * C, *dyn = dy + n * P * C, *g = gain + n * stride, *b = bias + n * stride;
        float *dxn = dx + n * P * C;
        float offset[C], scale[C], drop[C], slope[C], sum[C], dg[C], db[C];  /* no pointers: none can overlap another */
        for (int64_t c = 0; c < C; c++) {
            scale[c] = rstd[n * G + c / D];
            offset[c] = (shift ? shift[n * C + c] : 0) - mean[n * G + c / D];
            dg[c] = db[c] = sum[c] = 0;
        }
        LOOP {  /* du, for now in the place of dx */
            float h = (xn[p * C + c] + offset[c]) * scale[c], du = dyn[p * C + c];
            if (act) {
                float u = h * g[c] + b[c], s = 1 / (1 + exponential(-u));
                du *= s * (1 + u * (1 - s));
            }
            dg[c] += du * h;
            db[c] += du;
            dxn[p * C + c] = du;
        }
        for (int64_t k = 0; k < G; k++) {  /* what moving the group's mean and deviation takes back */
            double plain = 0, along = 0;
            for (int64_t c = k * D; c < (k + 1) * D; c++) {
                plain += db[c] * g[c];
                along += dg[c] * g[c];
            }
            for (int64_t c = k * D; c < (k + 1) * D; c++) {
                drop[c] = plain / (P * D);
                slope[c] = along / (P * D);
            }
        }
        LOOP {
            float h = (xn[p * C + c] + offset[c]) * scale[c];
            float d = (dxn[p * C + c] * g[c] - drop[c] - h * slope[c]) * scale[c];
            dxn[p * C + c] = d;
            sum[c] += d;
        }
        memcpy(dgain + n * C, dg, sizeof dg);
        memcpy(dbias + n * C, db, sizeof db);
        if (dshift) memcpy(dshift + n * C, sum, sizeof sum);
    }
}
